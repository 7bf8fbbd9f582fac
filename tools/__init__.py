"""What measures and inspects instrdiv; run from the repository root, never imported by the package."""
