"""What is computed: layers, as a params struct with `spec` and `apply`, and what they share."""
