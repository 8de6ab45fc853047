"""What pretrain.py is made of: arguments, recipes, schedule, optimizer, checkpoints, records."""
