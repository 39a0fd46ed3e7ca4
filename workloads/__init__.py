"""What is computed: models, operator graphs, number formats, reference kernels, interpreters."""
