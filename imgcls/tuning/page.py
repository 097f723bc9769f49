def write_page(sweep, results):
    pass
