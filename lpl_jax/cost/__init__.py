"""What a step costs: operations, memory and collectives, counted or compiled for a machine that is not at hand."""
