"""What runs the plans: mesh, cache memory, compiled steps, and the loop that drives them."""
