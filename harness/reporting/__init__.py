"""What a reader gets: tables of clients, figures, captions, report.html."""
