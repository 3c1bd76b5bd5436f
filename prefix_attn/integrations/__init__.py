"""What other libraries need in order to use shared-prefix attention, one module for each.

Nothing is imported here: each module imports the library that it serves.
"""

# The oldest that verl takes; the tests pass with it. In 5.0 some decoders lack attributes of their
# own configs, and outer models hand down keywords that hold tokens.
OLDEST_TRANSFORMERS = "5.5.3"
