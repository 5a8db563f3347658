"""Networks that really shrink: coupled axes found in the program, units removed from all of them.

`_axes` are the dimensions of arrays and what they share; `_rules` and `_infer` find them for every
array of a program; `_zeros` says where removal changes nothing; `_groups` is what users see of it;
`_narrow` runs the program on smaller arrays; `_shrink` puts it together and proves it.
"""
