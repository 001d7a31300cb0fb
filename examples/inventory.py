"""A small stock room: items, how many there are, and what they are worth."""

from dataclasses import dataclass, field


@dataclass
class Item:
    name: str
    price: float
    quantity: int = 0

    def total_price(self) -> float:
        return self.price * self.quantity


@dataclass
class Inventory:
    items: dict[str, Item] = field(default_factory=dict)

    def add(self, item: Item) -> None:
        self.items[item.name] = item

    def get(self, name: str) -> Item:
        

    def total(self) -> float:
        return sum(item.total_price() for item in self.items.values())


def main() -> None:
    inventory = Inventory()
    inventory.add(Item("apple", 0.5, 12))
    inventory.add(Item("pear", 0.7, 3))
    print(inventory.total())


if __name__ == "__main__":
    main()
