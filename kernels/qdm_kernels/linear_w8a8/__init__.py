"""Linear layer on signed int8 activation and weight codes."""
