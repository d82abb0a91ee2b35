"""The kernels for half precision on a GPU; `nirvana.ops.dispatch` imports a module when needed."""
