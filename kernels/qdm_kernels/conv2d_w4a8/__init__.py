"""2-D convolution on int8 activation codes and int4 weight codes, two to a byte."""
