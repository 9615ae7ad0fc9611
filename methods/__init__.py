"""The methods of Pare, one file each. See `contract` for what a method is."""

if __name__ == "methods":
    raise ImportError("import this package as pare.methods: the bare name would make a second, empty registry of methods")
