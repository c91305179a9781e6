"""Every setting of a run: typed, checked, read from a YAML recipe and from flags.

`settings` has one class per verb (`training` and `benchmarks` hold those of `train` and `bench`),
`groups` what verbs share, `names` knows what the settings were called before, `flags` splits a
command line and prints its help, `reading` turns recipe and flags into checked settings.
"""
