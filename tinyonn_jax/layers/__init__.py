"""What is computed: each file holds a params struct, its `spec` and its `apply`."""
