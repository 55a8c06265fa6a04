"""The commands: each gathers its options, calls one function of the library and shows what it found."""
