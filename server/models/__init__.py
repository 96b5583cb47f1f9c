"""Model files on this machine: those in a folder, those in the Hugging Face cache, and what each would take."""
