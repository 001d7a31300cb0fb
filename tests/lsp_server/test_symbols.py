"""Which function a line is in, in several languages."""

import pytest

from lsp_server import symbols

PYTHON = '''@decorated
@twice(1)
def first(
    a,
    b,
) -> int:
    """Adds.

no indentation here
    """
    if a:

        return helper(a)
    return a


class Second:
    x = 1

    async def inner(self):
        return self.other(1)

    def other(self, n): return n


def helper(a):
    """Helps."""
    return a
'''
JAVASCRIPT = """export const add = (a, b) => {
  return a + b;
};

class Shop {
  async total(tax) {
    if (tax) {
      return 1;
    }
  }
}

function last() { return 1; }
"""
GO = """package p

func (s *Shop) Add(n int) error {
	for i := range n {
		s.add(i)
	}
	return nil
}
"""
C = """static int
add(int a, int b)
{
    return a + b;
}

int main(void) {
    return add(1, 2);
}
"""
RUST = """#[test]
pub(crate) async fn add<T>(a: T) -> T
where
    T: Add,
{
    a
}
"""
RUBY = "class Shop\n  def total\n    1\n  end\nend\n"


@pytest.mark.parametrize(
    ("text", "language", "line", "expected"),
    [
        (PYTHON, "python", 0, ("first", 0, 13)),
        (PYTHON, "python", 4, ("first", 0, 13)),
        (PYTHON, "python", 8, ("first", 0, 13)),
        (PYTHON, "python", 13, ("first", 0, 13)),
        (PYTHON, "python", 14, None),
        (PYTHON, "python", 17, ("Second", 16, 22)),
        (PYTHON, "python", 20, ("inner", 19, 20)),
        (PYTHON, "python", 22, ("other", 22, 22)),
        (JAVASCRIPT, "javascript", 1, ("add", 0, 2)),
        (JAVASCRIPT, "javascript", 7, ("total", 5, 9)),
        (JAVASCRIPT, "javascript", 10, ("Shop", 4, 10)),
        (JAVASCRIPT, "javascript", 12, ("last", 12, 12)),
        (GO, "go", 4, ("Add", 2, 7)),
        (C, "c", 3, ("add", 1, 4)),
        (C, "c", 7, ("main", 6, 8)),
        (RUST, "rust", 5, ("add", 0, 6)),
        (RUBY, "ruby", 2, ("total", 1, 3)),
    ],
)
def test_the_innermost_function_or_class_is_found(text: str, language: str, line: int, expected: tuple | None):
    found = symbols.symbol_at(text.splitlines(keepends=True), language, line)
    assert (found and (found.name, found.first, found.last)) == expected


CPP = """#define MOST 3
// not this(one) {
int counted(const Shop& shop, int most);
class Shop : public Place {
  public:
    int size() const {
        int inner = 1;
        return inner;
    }

  private:
    std::vector<Item> items;
};
"""
TYPESCRIPT = """import { a } from "./a";
export const LIMIT = 3;
export interface Item {
  name: string;
  /** how(many) */
  count?: number;
}
describe("x", () => {
  const inside = 1;
});
"""


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        (
            PYTHON,
            "python",
            "@decorated|@twice(1)|def first(|    a,|    b,|) -> int:|class Second:|    x = 1|    async def inner(self):"
            "|    def other(self, n): return n|def helper(a):",
        ),
        ('"""Words.\n\nclass Not:\n"""\nX: int = 1\nif X:\n    Y = 2\nfor z in X: print(z)\n', "python", "X: int = 1"),
        (JAVASCRIPT, "javascript", "export const add = (a, b) => {|class Shop {|  async total(tax) {|function last() { return 1; }"),
        (
            TYPESCRIPT,
            "typescript",
            'export const LIMIT = 3;|export interface Item {|  name: string;|  count?: number;|describe("x", () => {',
        ),
        (
            CPP,
            "cpp",
            "#define MOST 3|int counted(const Shop& shop, int most);|class Shop : public Place {|    int size() const {"
            "|    std::vector<Item> items;",
        ),
        (GO, "go", "func (s *Shop) Add(n int) error {"),
        (RUBY, "ruby", "class Shop|  def total"),
        ("a: 1\nb: c\n", "yaml", ""),
        ("x" * 10_000 + " = 1\n", "python", ""),
    ],
)
def test_an_outline_has_the_headers_and_names_of_a_file_and_nothing_of_its_functions(text: str, language: str, expected: str):
    assert "|".join(symbols.outline(text.splitlines(keepends=True), language)) == expected


def test_headers_of_what_is_called_come_with_the_first_line_of_their_docstrings():
    lines = PYTHON.splitlines(keepends=True)
    first, inner = symbols.symbol_at(lines, "python", 4), symbols.symbol_at(lines, "python", 20)
    assert symbols.signatures(lines, "python", first) == ['def helper(a):\n    """Helps."""']
    assert symbols.signatures(lines, "python", inner) == ["    def other(self, n): return n"]
