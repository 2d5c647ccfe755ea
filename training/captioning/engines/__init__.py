"""What computes captions: this process, Ray, vLLM."""
