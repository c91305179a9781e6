"""Every setting of a run: typed, checked, read from a YAML recipe and from flags.

`settings` has one class per verb (`training` and `benchmarks` hold those of `train` and `bench`),
`groups` has what verbs share, `names` knows deprecated names and those of other trainers, `flags`
splits a command line and prints its help, `reading` turns recipe and flags into checked settings.
"""
