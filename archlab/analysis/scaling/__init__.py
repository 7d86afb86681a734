"""Scaling laws: ladders of sizes and budgets, the laws fitted to them, and how much compute one architecture saves
against another."""
