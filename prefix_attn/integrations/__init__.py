"""What other libraries need in order to use shared-prefix attention, one module for each.

Nothing is imported here: each module imports the library that it serves.
"""
