"""What tests share beside pytest: stand-ins for hardware that need not be there."""
