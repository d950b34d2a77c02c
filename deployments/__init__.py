"""Groundswell: vLLM engines as one fleet behind one OpenAI API, on Ray Serve."""
