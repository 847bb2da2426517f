"""Methods of the field that change more of a head than its loss, one a file."""
