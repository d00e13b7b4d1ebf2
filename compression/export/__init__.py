"""A compressed model in the form that another program loads, checked in that program.

- `multiplied_out`: Any structure as its stock class: factors multiplied, borrowed weights copied,
  widths padded.
"""
