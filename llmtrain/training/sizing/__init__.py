"""How large and how long a run will be: parameters, FLOPs, memory and time, from shapes and rates alone."""
