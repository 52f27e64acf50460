"""How fast the fast track is: against the machine's limit and against everybody else, after it was proven right.

`measure` runs everything; `shapes` says at which sizes and what must be reached, `peers` who is compared, `limits` what the hardware
allows, `gate` what has to be equal before a number is shown, `timing` how numbers are taken.
"""
