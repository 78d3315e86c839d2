"""What a person sees: metrics, figures, the console and the report."""
