"""What a user gives a trainer (arguments, settings, other libraries' configs): read and checked before it is loaded."""
