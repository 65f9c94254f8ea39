"""Planning: what a model costs on a machine, and which pipeline plan runs it fastest."""
