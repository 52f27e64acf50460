"""The experts as one C call for CPUs: the source, its loader, and the packed copies of weights that do not change.

Read `moe.c` first. `build` compiles and finds the library, `library` calls it, `packing` decides when a packed copy pays.
"""
