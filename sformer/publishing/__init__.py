"""Publishing: what was recorded about a model, as a card with plots and as a repository on the Hugging Face Hub."""
