"""What a training step costs: operations, memory, collectives and time, counted, compiled or measured.

flops           operations from formulas, in the paper's convention and the usual one, and of a traced program
paper_tables    the paper's Tables 7 and 8 from these formulas
architectures   frozen networks as shapes, by their published architecture: nothing is fetched
step_cost       one step of an experiment: formulas, trace, compiled program, measured time
profile         all of these in one report
topology        machines to compile for by name: TPU slices, emulated CPU devices
compile_report  one step compiled ahead of time for such a machine: whether it fits, and the largest batch that does
hlo             operations and collectives in the text of an optimised program
plan            the memory plan of libtpu before it generates code (experimental)
guard           whether the compiled step has grown, against values in a file
"""
