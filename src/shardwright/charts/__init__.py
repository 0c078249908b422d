"""Every picture the package draws, by matplotlib; one file a kind of picture."""
