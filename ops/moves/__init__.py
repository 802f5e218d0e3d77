"""How rows of arrays move: picked, written and added up, in each device's best form."""
