"""What a model is: its architecture, the parameter table, how it is built on Megatron-Core, Hugging Face weights both ways."""
