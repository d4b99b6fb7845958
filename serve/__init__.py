"""HTTP only, through the runtime client."""
