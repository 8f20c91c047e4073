"""Tables -> pictures: a figure is a table and one function."""
