"""Operations that are worth a kernel of their own, a folder each."""
