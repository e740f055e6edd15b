"""What a frozen encoder makes of images and videos, computed once."""
