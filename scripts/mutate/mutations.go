package main

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
)

// mutation replaces the bytes from begin to end of a file.
type mutation struct {
	begin, end int
	with       string
	line       int
	what       string
}

func (m mutation) apply(source []byte) []byte {
	return slices.Concat(source[:m.begin], []byte(m.with), source[m.end:])
}

// mutations returns the small changes that can be made to a file: a condition is negated, && and || change places, a
// comparison includes its bound or not, an arithmetic operator is inverted, a statement goes, a function returns early.
func mutations(source []byte) (all []mutation, err error) {
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, "", source, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	at := func(p token.Pos) int { return files.Position(p).Offset }
	add := func(begin, end token.Pos, with, what string) {
		old := source[at(begin):at(end)]
		if line, _, more := bytes.Cut(old, []byte("\n")); more {
			old = append(bytes.Clone(line), "…"...)
		}
		all = append(all, mutation{at(begin), at(end), with, files.Position(begin).Line, fmt.Sprintf("%s: %s", what, old)})
	}
	ast.Inspect(file, func(node ast.Node) bool {
		switch n := node.(type) {
		case *ast.GenDecl:
			return n.Tok == token.VAR
		case *ast.IfStmt:
			add(n.Cond.Pos(), n.Cond.End(), "!("+string(source[at(n.Cond.Pos()):at(n.Cond.End())])+")", "negate the condition")
		case *ast.BinaryExpr:
			if with, ok := swapped[n.Op]; ok {
				add(n.OpPos, n.OpPos+token.Pos(len(n.Op.String())), with.String(), "use "+with.String()+" for")
			}
		case *ast.ExprStmt:
			if _, ok := n.X.(*ast.CallExpr); ok {
				add(n.Pos(), n.End(), "", "drop the call")
			}
		case *ast.IncDecStmt:
			add(n.Pos(), n.End(), "", "drop the statement")
		case *ast.AssignStmt:
			if n.Tok != token.DEFINE {
				add(n.Pos(), n.End(), ignored(n, source, at), "drop the assignment")
			}
		case *ast.FuncDecl:
			if n.Body != nil && n.Type.Results == nil && len(n.Body.List) > 1 {
				add(n.Body.Lbrace, n.Body.Lbrace+1, "{ if true { return };", "return at once from "+n.Name.Name)
			}
		}
		return true
	})
	return all, nil
}

var swapped = map[token.Token]token.Token{
	token.LAND: token.LOR, token.LOR: token.LAND,
	token.LSS: token.LEQ, token.LEQ: token.LSS, token.GTR: token.GEQ, token.GEQ: token.GTR,
	token.EQL: token.NEQ, token.NEQ: token.EQL,
	token.ADD: token.SUB, token.SUB: token.ADD,
}

// ignored returns what takes the place of an assignment: its right side, so that variables stay used.
func ignored(n *ast.AssignStmt, source []byte, at func(token.Pos) int) string {
	if len(n.Lhs) != len(n.Rhs) {
		return ""
	}
	var text string
	for _, value := range n.Rhs {
		text += "_ = " + string(source[at(value.Pos()):at(value.End())]) + "; "
	}
	return text
}
