"""Rows from anywhere: files, columns, pictures, texts, splits."""
