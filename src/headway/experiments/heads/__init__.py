"""Every head architecture at equal steps on the same text: what each learns, drafts and costs."""
