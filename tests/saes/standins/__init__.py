"""Stand-ins for the SAEs of other packages, by their documented interfaces, where those packages are not installed.

Written for the tests: dense PyTorch, as plain as can be. Each class says that it comes from a module of its package, by
which `accelerate` knows it. tests/interop/ has the same tests with the packages themselves.
"""
