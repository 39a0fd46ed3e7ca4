"""Maps dataflow sections onto a grid of compute and memory units.

`allocate` shares units out among the stages of a pipeline, cuts graphs into sections and finds where paths need
buffers; `netlist` holds the units of a section and the streams between them; `place` and `route` put them onto the
`fabric`; `draw` shows the result.
"""
