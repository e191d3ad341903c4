"""The products on sale: what each costs, and how many there are when the service starts for the first time.

Prices are constant and stand here alone. How many are left is in the stock bucket (see `tasks.stock`).
"""

from __future__ import annotations

from dataclasses import dataclass

CURRENCY = "EUR"


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One product: `unit_price` in minor units, `initial_stock` in pieces, `category` in a word for customers."""

    sku: str
    name: str
    unit_price: int
    initial_stock: int
    category: str = "More"


CATALOGUE: dict[str, CatalogueEntry] = {
    entry.sku: entry
    for entry in (
        CatalogueEntry("MUG-01", "Enamel mug", 1_290, 100_000, "Kitchen"),
        CatalogueEntry("TEE-01", "T-shirt, organic cotton", 2_450, 100_000, "Clothing"),
        CatalogueEntry("NOTE-01", "Notebook, dotted", 895, 100_000, "Paper"),
        CatalogueEntry("BAG-01", "Canvas bag", 1_999, 100_000, "Clothing"),
        CatalogueEntry("LAMP-01", "Desk lamp", 5_900, 100_000, "Living"),
        CatalogueEntry("KETTLE-01", "Kettle, 1.2 l", 7_450, 100_000, "Kitchen"),
        CatalogueEntry("CHAIR-01", "Folding chair", 12_900, 20_000, "Living"),
        CatalogueEntry("PRINT-01", "Print, signed, limited to 50", 24_000, 50, "Paper"),
    )
}
