"""
Moving the books from one store to another, by way of a file. One module each: the two ways, the order, the file.

Works on any store that has `Store.books` and `Store.fill`; knows none of them.
"""

from asgi_metering.stores.moving.moves import Moved, export_books, import_books

__all__ = ["Moved", "export_books", "import_books"]
