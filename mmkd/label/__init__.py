"""Write down what a detector finds in images, as COCO JSON."""
