"""What Triton and ptxas make of the kernels: compiled ahead of time, modelled, held to a budget."""
