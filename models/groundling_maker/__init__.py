"""How the model in `models/groundling` is made: its data, tokenizer, training, export and measurement."""
