"""Questions that a person answers in a browser, and ways for labels in and out."""
