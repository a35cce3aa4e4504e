// Tables of class "sortable": a click on a heading sorts by its column, a second one the other way round.
document$.subscribe(() => {
  for (const table of document.querySelectorAll('table.sortable')) {
    const heads = [...table.tHead.rows[0].cells]
    heads.forEach((head, column) => {
      head.tabIndex = 0
      head.setAttribute('role', 'button')
      const sort = () => {
        const down = head.getAttribute('aria-sort') === 'ascending'
        heads.forEach(other => other.removeAttribute('aria-sort'))
        head.setAttribute('aria-sort', down ? 'descending' : 'ascending')
        const text = row => row.cells[column].textContent.trim()
        const body = table.tBodies[0]
        const rows = [...body.rows].sort((a, b) => {
          if (!text(a) || !text(b)) return (text(a) ? 0 : 1) - (text(b) ? 0 : 1) // empty ones stay below
          return text(a).localeCompare(text(b), 'en', {numeric: true}) * (down ? -1 : 1)
        })
        body.append(...rows)
      }
      head.addEventListener('click', sort)
      head.addEventListener('keydown', event => event.key === 'Enter' && sort())
    })
  }
})
